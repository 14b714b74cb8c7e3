"""Evaluation: questions asked, answers judged, and a sheet to look at.

`judge` says what is right in pure Python, `runner` asks a model and writes samples and metrics,
`sheet` draws them. `tasks` holds the tasks with their `metrics` and scores `records` of a file;
none of these three imports JAX.
"""
