"""What is measured: each module has rows that the command knows by name.

  cold.py      a cold pull beside the peers', against the bound
  cores.py     one big layer on one core and on all; progress streaming against none
  warm.py      pulls of an image that is there
  store.py     starting, listing and pulling with few and with many images in the store
  bake.py      baking an image and one more that shares its layers, pods of it, records, deep verification
  growth.py    entries in a layer, layers in an image, callers at once

A row is a function that takes a `Bench`, measures, and adds `Figure`s to its report.
"""
