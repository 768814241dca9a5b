"""Questions beyond the paper's claim; see README.md."""
