"""Demonstrates guestpull on real images, and with `bake` a guest image, for `scripts/demo`.

  __main__.py   the command: prepares a directory, runs a demonstration, cleans up
  stage.py      shows and runs commands, and runs daemons in the background
  images.py     the images: Debian, Python on top of it, a shop on top of that; created once and kept
  story.py      pulls, lists, pulls a second image, runs it, reuses it in another work directory, removes all
  guest.py      builds a guest's root filesystem with baked containers, and boots it without a hypervisor

bash runs the commands exactly as shown, except for the `kill` of a daemon. The project imports nothing from here.
"""
