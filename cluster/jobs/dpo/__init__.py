"""The parts of `cluster.jobs.train_dpo`, which trains a guider on preference pairs (ThinkLogit-DPO, arXiv 2507.12759).

It may import `cluster.jobs` and `actors`. Only `fit`, `trainer`, `scoring` and `events` load torch.
"""
