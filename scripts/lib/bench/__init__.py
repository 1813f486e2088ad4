"""What `scripts/bench` measures, and with what.

In: this checkout, Debian's podman, containerd, skopeo, umoci and docker-registry, and the files of this
machine's /usr. Out: a table for people, and a file for machines (`--json`).

  __main__.py    the command: sets the place up, measures the rows, prints, cleans up
  place.py       where it happens: a tmpfs in a mount namespace of our own, a cgroup that counts CPU time
  tree.py        the image: which of this machine's files, and what of them must be found after a pull
  layers.py      tar streams -> blobs, in gzip -6, zstd and plain at once
  images.py      the images that are measured; made once, and kept in the registry's directory
  registry.py    Debian's docker-registry, and pushing to it
  contenders.py  guestpulld, podman, containerd, and skopeo with umoci: one cold pull of each
  check.py       whether a root filesystem is the image
  memory.py      peak of the summed PSS, by a process of its own
  bound.py       what the work itself costs: inflate, both hashes, creating the files; each alone
  daemon.py      a guestpulld, from its start to its end
  context.py     what every row is handed
  rows/          what is measured of guestpulld alone
  report.py      figures, the tables, the file
  profile.py     where a cold pull spends its time; sample.py, where a worker does

Nothing here is imported by the project. Start with `__main__.measure`.
"""
