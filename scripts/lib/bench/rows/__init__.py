"""The rows of the benchmark, which the command finds by name.

  cold.py      a cold pull by each tool, compared with the bound
  cores.py     one big layer on one core and on all cores; a pull with and without progress events
  warm.py      pulls of an image that is in the store
  store.py     start, lists and pulls with few and with many images in the store
  bake.py      baking an image and another with common layers, pods from it, records, deep verification
  growth.py    entries in a layer, layers in an image, concurrent callers

A row is a function that takes a `Bench`, measures, and adds `Figure`s to its report.
"""
