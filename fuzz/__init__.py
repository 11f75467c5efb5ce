"""Coverage-guided fuzzing of every parser that reads an upload before anybody has vouched for it."""
