"""`guestpull-agent`: stands in for Kata's agent, for containers whose image is pulled in the guest.

In: a CreateContainerRequest of Kata's agent.proto as JSON, or an image and a command. Out: the container's exit
status. It follows kata-containers' src/agent (image_pull_handler.rs, image.rs, rpc.rs):

  container.py  pulls, merges, runs and releases one container. Start here
  request.py    parses the request and finds the storage with the image to pull
  spec.py       translates Kata's spelling of a runtime specification
  merge.py      merges the pod's specification with the image's
  files.py      reads and writes a bundle's config.json
  pause.py      sets up a sandbox from the guest's own pause image
  runtime.py    runs runc or crun in the foreground
  signals.py    handles signals before, during and after the run
  cli.py        the commands

The agent never mounts or unpacks images; the service does. It differs from Kata's agent where it has no virtual
machine: it passes namespaces and mounts of the request to the runtime unchanged, skips storages of other
drivers with a warning, and runs the container until it exits, in one command.
"""

from __future__ import annotations

from guestpull_client.agent.container import Container, RunOptions, run_container
from guestpull_client.agent.request import container_of_request

__all__ = ["Container", "RunOptions", "container_of_request", "run_container"]
