"""Run a model over recorded bags: resumable, in several processes."""
