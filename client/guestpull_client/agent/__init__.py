"""`guestpull-agent`: a stand-in for Kata's agent, as far as it creates containers of images pulled in the guest.

In: a CreateContainerRequest of Kata's agent.proto as JSON, or an image and a command. Out: the container's exit
status. In between, as in kata-containers' src/agent (image_pull_handler.rs, image.rs, rpc.rs):

  request.py    the request: which storage asks for a guest pull, and of what
  spec.py       Kata's spelling of a runtime spec -> the runtime specification's
  merge.py      the pod's container specification + the image's process -> config.json
  files.py      a bundle's config.json, read and written
  pause.py      a sandbox: the guest's own pause image instead of a pull
  container.py  the story: bundle directory, pull, merge, run, release. Start here
  runtime.py    runc or crun in the foreground
  signals.py    what a signal means before, while and after the container runs
  cli.py        the commands

It never mounts or unpacks anything: that is the service's. It differs from Kata's agent where that one cannot be
followed without a virtual machine: namespaces and mounts of the request go to the runtime as they are, storages of
other drivers are left out with a warning, and the container is run to its end in one command.
"""

from __future__ import annotations

from guestpull_client.agent.container import Container, RunOptions, run_container
from guestpull_client.agent.request import container_of_request

__all__ = ["Container", "RunOptions", "container_of_request", "run_container"]
