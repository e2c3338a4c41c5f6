"""reproduce and show-batch: a run again from its record, and the batch of any step."""
