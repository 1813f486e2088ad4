"""Fuzzing of everything that reads what others wrote: the implementation of `scripts/fuzz`.

  __main__.py   the command line
  campaign.py   runs targets for a time, and keeps what reproduces a failure
  mutation.py   valid inputs -> damaged ones
  targets.py    what is fuzzed: inputs to begin with, and how one is tried

An input fails its target if anything but a named error comes out, if it takes too long, or if it costs too
much memory. Every input follows from the seed and its number, so that a campaign can be run again.
"""
