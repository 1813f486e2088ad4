"""Images in local files and directories, named as skopeo names them.

    oci:PATH[:TAG]              an OCI image layout in a directory
    oci-archive:FILE[:TAG]      an OCI image layout in a tar archive
    docker-archive:FILE[:REF]   an archive written by docker save, podman or skopeo; FILE:@N selects image N

In: such a name. Out: an ImageSource, with the same checks as for a registry.

  opening.py         opens the source that a name stands for
  layout.py          OCI image layouts
  docker_archive.py  archives of docker save, for which a manifest is generated
  archive.py         tar archives, compressed or not
  tree.py            the files of an archive or a directory
  blob.py            a blob as a verified stream

Nothing is unpacked here, and nothing is written under a name from an archive. Start with `opening.open_local`.
"""

from guestpull_server.registry.local.opening import is_local, open_local

__all__ = ["is_local", "open_local"]
