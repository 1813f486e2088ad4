"""Images that lie on this machine, as skopeo names them.

    oci:PATH[:TAG]              an OCI image layout, in a directory
    oci-archive:FILE[:TAG]      the same, in a tar archive
    docker-archive:FILE[:REF]   what docker save, podman and skopeo write; FILE:@N is the Nth of its images
    docker://REFERENCE          an image of a registry, which is the same as the reference alone

In: such a text. Out: an ImageSource, with the same checks as one of a registry.

  sources.py         open_source: from the text to the source
  layout.py          OCI image layouts
  docker_archive.py  docker save's form, which has no manifest; one is made up
  archive.py         tar archives, compressed or not
  files.py           what these and directories share
  blob.py            a blob as a verified stream

Nothing is unpacked here, and nothing written under a name that an archive gives. Start with `sources.open_source`.
"""

from guestpull_server.registry.local.sources import is_local, open_source

__all__ = ["is_local", "open_source"]
