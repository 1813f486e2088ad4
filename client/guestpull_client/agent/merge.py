"""Merges the pod's container specification with the image's into the container's config.json.

The process is merged as by Kata's `merge_oci_process`: the pod's arguments override the image's, so does its
working directory unless it is `/`, and the image's environment is added except for variables that the pod sets.

Two differences are intended. Kata treats a variable as set if its name occurs anywhere in a variable of the
pod, so that LD_LIBRARY_PATH drops the image's PATH; the agent compares whole names. Kata's shim always sends a
complete specification, but a request written by hand may be incomplete; the agent takes missing parts, such as
the user, from the config.json that the service wrote.
"""

from __future__ import annotations

from guestpull_client.agent.spec import JsonObject, part, text, texts


def merged_specification(pod: JsonObject, image: JsonObject, rootfs: str) -> JsonObject:
    """Merge two specifications into a complete one.

    Args:
        pod: the specification of the request, with the runtime specification's names.
        image: the config.json that the service wrote.
        rootfs: absolute path of the mounted root filesystem.
    """
    set_by_pod = {name: value for name, value in pod.items() if value not in ("", [], {})}
    return {
        **image,
        **set_by_pod,
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
        # protobuf omits zeros: a user without numbers is root
        process["user"] = {"uid": 0, "gid": 0} | part(pod, "user")
    return process
