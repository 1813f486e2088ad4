"""Measures guestpulld beside other tools, for `scripts/bench`.

In: this checkout, Debian's podman, containerd, skopeo, umoci and docker-registry, and the files of this
machine's /usr. Out: a table for people, and a file for machines (`--json`).

  __main__.py    the command: prepares the place, measures the rows, prints, cleans up
  place.py       a tmpfs in our own mount namespace, and cgroups that count CPU time
  tree.py        the main image: chooses files of this machine, and knows the expected result of a pull
  layers.py      compresses tar streams to blobs, as gzip -6, zstd and plain at once
  images.py      the measured images; created once, and kept in the registry's directory
  registry.py    runs Debian's docker-registry and pushes to it
  contenders.py  one cold pull by guestpulld, podman, containerd, or skopeo with umoci
  check.py       compares a root filesystem with the image
  memory.py      samples the peak of the summed PSS, in a separate process
  bound.py       the cost of inflating, hashing and creating files, each alone
  daemon.py      runs a guestpulld
  context.py     the context that every row gets
  rows/          the measurements of guestpulld alone
  report.py      figures, tables, the JSON file
  profile.py     where a cold pull spends its time; sample.py, where a worker does

Nothing here is imported by the project. Start with `__main__.measure`.
"""
