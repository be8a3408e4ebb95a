"""A model over recorded bags: resumable, in several processes."""
