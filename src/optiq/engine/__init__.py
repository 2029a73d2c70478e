"""Running a model: from messages to a stream of events."""
