"""What `scripts/demo` shows: guestpull's story on real images, and with `bake` that of a guest image.

  __main__.py   the command: takes a place on this machine, tells a story, leaves nothing
  stage.py      shows commands as typed, with what they print; keeps what runs beside them
  images.py     the images: Debian, Python on top of it, a shop on top of that; made once and kept
  story.py      pull, look, pull what is new, run, reuse in another work directory, let go
  guest.py      a guest's root filesystem with baked containers, booted as far as a machine lets it

What is shown is run as it is shown, by bash, but for the ends of what runs beside (`kill`). Nothing here is
imported by the project.
"""
