"""Evaluation: questions asked, answers judged, and a sheet to look at.

`judge` says what is right in pure Python, `runner` asks a model and writes samples and metrics,
`sheet` draws them.
"""
