"""The walls around a job's process, each by itself, and the prisoner who tries them."""
