"""The benchmark behind scripts/bench.

  __main__.py  options, the order of the rows, the report
  images.py    the image that all pull: made once, kept
  contenders.py  guestpull and its peers: pull cold, check what came, forget it
  bound.py     the work itself, each part alone: what no arrangement of it can undercut
  growth.py    rows of guestpull alone: warm pulls, big stores, many layers, many entries, many callers
  machine.py   tmpfs, registry, processes: their CPU seconds and their memory
  report.py    tables and JSON

Start with `__main__.main`.
"""
