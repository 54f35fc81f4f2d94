"""Contracts between all rooms, as data: vocabulary, episodes, layouts, datasets, results.

Nothing here reads a log, touches a tensor or knows a model. A change to a file
format is a change here first, together with its schema version.
"""
