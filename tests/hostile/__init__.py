"""The tricks that ``tests.hostile_files.hostile_files()`` lists, a module for each family."""
