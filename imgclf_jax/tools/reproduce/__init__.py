"""reproduce and show-batch: training a run again from its record, and the batch of any step."""
