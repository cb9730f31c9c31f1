"""Preference training of a guider (ThinkLogit-DPO, arXiv 2507.12759): what `cluster.jobs.train_dpo` is made of."""
