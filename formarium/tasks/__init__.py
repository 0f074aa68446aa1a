"""One room a task: batches, predictions, losses' targets, metrics, readers, sample data, drawing."""
