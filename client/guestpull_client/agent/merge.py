"""The pod's container specification and the image's -> the config.json that the container is run with.

The rule for the process is that of Kata's `merge_oci_process`: the pod's arguments win over the image's, its
directory too unless it is `/`, and of the image's environment comes what the pod does not set.

Two differences, both on purpose. Kata takes a variable for set when its name occurs anywhere in any variable of
the pod, so that a LD_LIBRARY_PATH costs the container its PATH; here whole names are compared. And Kata's shim
always sends a complete specification, while a request written by hand leaves parts out: those are as the service
wrote them, the user that the image says included.
"""

from __future__ import annotations

from guestpull_client.agent.spec import JsonObject, part, text, texts


def merged_specification(pod: JsonObject, image: JsonObject, rootfs: str) -> JsonObject:
    """The specification that a runtime can start.

    Args:
        pod: the request's, with the specification's names.
        image: the config.json that the service wrote.
        rootfs: the pulled image's mounted root filesystem, absolute.
    """
    said = {name: value for name, value in pod.items() if value not in ("", [], {})}
    return {
        **image,
        **said,
        "ociVersion": image.get("ociVersion", "1.0.2"),
        "process": _merged_process(part(pod, "process"), part(image, "process")),
        "root": {"path": rootfs, "readonly": part(pod, "root").get("readonly") is True},
        "linux": part(image, "linux")
        | {k: v for k, v in part(pod, "linux").items() if v not in ("", [], {})},
    }


def _merged_process(pod: JsonObject, image: JsonObject) -> JsonObject:
    process = image | {name: value for name, value in pod.items() if value not in ("", [])}
    directory = text(pod, "cwd")
    if directory in ("", "/"):
        process["cwd"] = text(image, "cwd") or "/"
    environment = texts(pod, "env")
    set_by_pod = {variable.partition("=")[0] for variable in environment}
    process["env"] = [
        *environment,
        *(variable for variable in texts(image, "env") if variable.partition("=")[0] not in set_by_pod),
    ]
    if "user" in pod:
        # protobuf leaves zeros out: a user without numbers is root
        process["user"] = {"uid": 0, "gid": 0} | part(pod, "user")
    return process
