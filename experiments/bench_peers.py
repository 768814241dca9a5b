"""bench_peers.py: the same work by transformers (sampling) and by TRL (an update by PPO).

    pip install transformers==5.23.0 trl==1.12.0    # the last release of TRL that has PPO
    python experiments/bench.py --peers

It measures the time of each over ours, by models of equally many weights: `rollout_vs_hf` and
`update_vs_trl`; null if one of the two is not installed.
"""
import contextlib
import copy
import importlib.util
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

import ppo
from experiments.bench_work import TURNS, WRITTEN, Metronome, by_turns, compare, metronomes
from mem1 import keep_last, rollout
from model import GPT


def bench(endless, cfg, pairs):
    """{name: number}."""
    for name in "transformers", "trl":
        if importlib.util.find_spec(name) is None:
            print(f"{name} is not installed: nothing is compared")
            return {}
    shape = shape_of(cfg, endless.config.vocab_size)
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    return dict(rollout_vs_hf=against_transformers(endless, shape, cfg.ppo_batch, pairs),
                update_vs_trl=against_trl(endless, shape, cfg, pairs))


def shape_of(cfg, vocab_size):
    """The settings of a Llama of as many weights as ours."""
    return dict(
        vocab_size=vocab_size, hidden_size=cfg.n_embd, num_hidden_layers=cfg.n_layer,
        intermediate_size=8 * cfg.n_embd // 3, num_attention_heads=cfg.n_head,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, pad_token_id=None,
        max_position_embeddings=4096, use_cache=True)


def against_transformers(endless, shape, episodes, pairs):
    """A rollout by generate(), which encodes the whole context again in each turn."""
    import transformers
    transformers.utils.logging.set_verbosity_error()
    device = endless.emb.weight.device.type
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).eval().to(device)
    weights, theirs = (sum(p.numel() for p in model.parameters()) for model in (endless, llama))
    assert abs(theirs / weights - 1) < 0.01, f"models of {theirs} and {weights} weights"

    def generate(contexts, uniform):
        n, contexts = uniform.size(1), contexts.to(device)
        ids = llama.generate(contexts, attention_mask=torch.ones_like(contexts), max_new_tokens=n,
                             min_new_tokens=n, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                             pad_token_id=0)
        return ids[:, contexts.size(1) :]

    def ours():
        return rollout(endless, *metronomes(episodes), episodes)

    def their():
        return by_turns(*metronomes(episodes), generate)

    for trajs in ours(), their():
        assert sum(traj.n_trained for traj in trajs) == episodes * TURNS * WRITTEN
    text = (f"{episodes} episodes of {TURNS} turns; transformers {transformers.__version__}, "
            f"{theirs} weights against {weights}")
    ratio, _ = compare("rollout_vs_hf", their, ours, pairs, text, device)
    return ratio


def against_trl(endless, shape, cfg, pairs):
    """An iteration of PPO on episodes of one turn: 64 tokens read, 64 written, one step."""
    import trl
    E, T = max(8, cfg.ppo_batch // 2), 64
    one_step = replace(cfg, ppo_batch=E, ppo_epochs=1, ppo_minibatches=1, exercises=0)
    reference = GPT(endless.config)
    optimizer = torch.optim.AdamW(endless.parameters(), lr=1e-5)

    def ours():
        environments = [Metronome(1, T, T) for _ in range(E)]
        row = ppo.update(endless, optimizer, reference, environments, keep_last, one_step, 0)
        assert row["tokens"] == E * T and row["gap"] < 1e-4

    weights = sum(p.numel() for p in endless.parameters())
    text = (f"{E} episodes, {T} tokens read, {T} written; trl {trl.__version__}, policy and critic "
            f"of {weights} weights each")
    with tempfile.TemporaryDirectory() as out:
        trainer = trainer_of_trl(shape, E, T, out)

        def their():
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                trainer.train()

        ratio, _ = compare("update_vs_trl", their, ours, pairs, text)
    return ratio


def trainer_of_trl(shape, E, T, out):
    """With a policy, its reference, a critic and a small reward model. train() is one iteration;
    from the second on at a learning rate of 0, by its schedule, but the work is the same."""
    import datasets
    import transformers
    from tokenizers import Tokenizer, models
    from trl.experimental.ppo import PPOConfig, PPOTrainer
    V = shape["vocab_size"]
    vocab = {str(i): i for i in range(V + 2)}  # the last two, padding and end, are never sampled
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="0")), pad_token=str(V),
        eos_token=str(V + 1), padding_side="left")
    prompts = np.random.default_rng(0).integers(0, V, (E, T)).tolist()
    tasks = datasets.Dataset.from_dict({"input_ids": prompts})

    policy = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
    heads = []
    for layers in 1, shape["num_hidden_layers"]:
        config = transformers.LlamaConfig(**{**shape, "num_hidden_layers": layers, "num_labels": 1})
        heads.append(transformers.LlamaForSequenceClassification(config))
    reward_model, critic = heads
    args = PPOConfig(
        output_dir=out, total_episodes=E, per_device_train_batch_size=E, num_mini_batches=1,
        num_ppo_epochs=1, response_length=T, temperature=1.0, num_sample_generations=0,
        local_rollout_forward_batch_size=E, save_strategy="no", report_to=[], use_cpu=True,
        bf16=False, gradient_checkpointing=False, disable_tqdm=True, missing_eos_penalty=None,
        stop_token=None, learning_rate=1e-5)
    return PPOTrainer(args, tokenizer, policy, copy.deepcopy(policy), reward_model, tasks, critic,
                      eval_dataset=tasks.select(range(1)))
