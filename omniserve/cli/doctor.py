"""`omniserve doctor`: a report to paste into an issue. It never prints keys."""

import operator
import platform
import sys
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from omniserve import __version__
from omniserve.base.config import Options
from omniserve.base.numbers import human_bytes
from omniserve.cli import machine
from omniserve.cli.flags import NO_FLAGS, Common, layers, server_layers
from omniserve.cli.loading import leaving_at_once
from omniserve.cli.models import model_directory
from omniserve.cli.output import as_json, result


def doctor(
    *,
    json: Annotated[bool, Parameter(negative="")] = False,
    common: Common = Common(),  # noqa: B008  # frozen
) -> None:
    """Report versions, processor, memory, disk, and which implementation serves each operation and why.

    With --config the merged settings and where each value comes from.

    Parameters
    ----------
    json
        Print one JSON object.
    """
    options, origins = layers(NO_FLAGS, common)
    serving, server_origins = server_layers({}, common)
    report = _report(options)
    report["settings"] = {
        name: {"value": _shown(name, options if name in origins else serving), "origin": origin}
        for name, origin in (origins | server_origins).items()
        if common.config is not None or origin != "default"
    }
    if json:
        as_json(report)
        return
    for line in _lines(report):
        result(line)


def _shown(name: str, settings: Any) -> Any:
    """Return a setting's value; keys are counted, never shown."""
    value = operator.attrgetter(name)(settings)
    return f"{len(value)} keys" if name == "api_key" else list(value) if isinstance(value, tuple) else value


def _report(options: Options) -> dict[str, Any]:
    folders = [Path.cwd(), model_directory(), Path(options.download_dir or machine.hub_cache()).expanduser()]
    total, available = machine.memory_bytes()
    report: dict[str, Any] = {
        "omniserve": __version__,
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "cpu": machine.cpu(),
        "cores": machine.cores(),
        "isa": machine.instruction_sets(),
        "memory_bytes": total,
        "memory_available_bytes": available,
        "disk_free_bytes": {str(path): machine.disk_free_bytes(path) for path in folders},
        "gpus": machine.gpus(),
        "packages": {name: machine.version(name) for name in (*machine.NEEDED, *machine.OPTIONAL)},
        "threads": None,
        "torch_isa": None,
        "int8": None,
        "implementations": {},
        "cuda": None,
        "kernels": None,
        "problem": None,
    }
    try:
        with leaving_at_once():
            import torch
    except ImportError as error:
        report["problem"] = f"torch cannot be imported: {error}"
        return report
    report["threads"] = torch.get_num_threads()
    report["torch_isa"] = torch.backends.cpu.get_cpu_capability()
    report["cuda"] = machine.cuda()
    devices = ["cpu", *(["cuda"] if report["cuda"]["problem"] is None else [])]
    report["int8"] = machine.int8_self_test()
    reference = options.backend == "reference"
    report["implementations"] = {device: machine.implementations(device, reference=reference) for device in devices}
    report["kernels"] = machine.kernels()
    return report


def _lines(report: dict[str, Any]) -> list[str]:
    """Return the report for people: one fact per line."""
    packages = report["packages"]
    installed = [f"{name} {version}" for name, version in packages.items() if version is not None]
    missing = [name for name, version in packages.items() if version is None]
    lines = [
        f"omniserve   {report['omniserve']}",
        f"python      {report['python']} ({report['executable']})",
        f"platform    {report['platform']}",
        f"cpu         {report['cpu']}, {report['cores']} cores usable, {report['threads'] or '?'} torch threads",
        f"isa         {' '.join(report['isa']) or 'unknown'}; torch uses {report['torch_isa'] or '?'}",
        *_int8(report["int8"]),
        f"memory      {human_bytes(report['memory_bytes'])}, {human_bytes(report['memory_available_bytes'])} available",
        *(f"disk        {human_bytes(free)} free for {path}" for path, free in report["disk_free_bytes"].items()),
        *(f"gpu         {_gpu(gpu)}" for gpu in report["gpus"]),
        *_cuda(report["cuda"], found=bool(report["gpus"])),
        f"packages    {', '.join(installed)}",
        f"not there   {', '.join(missing) or 'nothing'}",
    ]
    for device, chosen in report["implementations"].items():
        names = max(len(name) for name in chosen)
        width = max(len(one["name"]) for one in chosen.values())
        lines.append(f"operations  on {device}:")
        lines += [f"            {name:<{names}}  {one['name']:<{width}}  {one['why']}" for name, one in chosen.items()]
    if report["kernels"]:
        lines += _kernels(report["kernels"], here="cuda" in report["implementations"])
    if report["settings"]:
        lines.append("settings")
        for name, entry in report["settings"].items():
            flag = name if name.startswith("limits.") else f"--{name.replace('_', '-')}"
            lines.append(f"            {flag} {entry['value']}  ({entry['origin']})")
    if report["problem"]:
        lines.append(f"problem     {report['problem']}")
    return lines


def _gpu(gpu: dict[str, str]) -> str:
    return (
        f"{gpu['name']}, compute capability {gpu['compute_cap']}, driver {gpu['driver_version']}, "
        f"{gpu['memory.total']}, {gpu['memory.free']} free"
    )


def _cuda(cuda: dict[str, Any] | None, *, found: bool) -> list[str]:
    """Return the lines about what serves on a GPU, or why none does."""
    if cuda is None:
        return []
    if cuda["problem"] is not None:
        return [f"cuda        {'not used' if found else 'no GPU found'}: {cuda['problem']}"]
    measured = " and ".join(cuda["tables"]) or "no card of its kind: defaults, `omniserve bench kernels` tells how fast"
    return [
        f"cuda        torch built for CUDA {cuda['built_for']}; {cuda['device']}, {cuda['processors']} multiprocessors",
        f"tables      products are cut as measured on {measured}",
        f"cache       compiled kernels in {cuda['cache']['folder']}, {human_bytes(cuda['cache']['bytes'])}",
    ]


def _kernels(kernels: dict[str, Any], *, here: bool) -> list[str]:
    """Return the lines about GPU kernels; where a GPU is, the table of its operations tells what serves."""
    if kernels["problem"]:
        return [f"kernels     {kernels['problem']}"]
    if here:
        return []
    names = max(len(name) for name in kernels["operations"])
    told = f"kernels     would serve on {kernels['needs']}; none is here:"
    return [told, *(f"            {name:<{names}}  {kernel}" for name, kernel in kernels["operations"].items())]


def _int8(tested: dict[str, Any] | None) -> list[str]:
    """Return the line about int8 products, which decide how fast quantized weights are on a CPU."""
    if tested is None:
        return []
    has = ", ".join(f"{name} {'yes' if there else 'no'}" for name, there in tested["instructions"].items())
    verdict = "passed" if tested["exact"] else "FAILED: sums saturate, so exact fp32 sums are used instead"
    return [f"int8        self-test of torch._int_mm {verdict} ({has})"]
