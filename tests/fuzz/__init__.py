"""Fuzzes all parsers of untrusted data; the implementation of `scripts/fuzz`.

  __main__.py   the command line
  campaign.py   runs targets, and keeps the inputs that fail
  mutation.py   damages valid inputs
  targets.py    the fuzzed code, with its valid inputs

An input fails if its target raises anything except a named error, takes too long, or uses too much memory. The
seed and the number of an input determine it, so that a campaign can be repeated.
"""
