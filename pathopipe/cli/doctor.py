"""``pathopipe doctor``: what this machine has, and what is missing."""

import importlib.metadata
import os
import platform
import sys

import typer

import pathopipe

__all__ = ["doctor"]

_PACKAGES = (
    "openslide-python",
    "openslide-bin",
    "tifffile",
    "imagecodecs",
    "numpy",
    "opencv-python-headless",
    "shapely",
    "zarr",
    "dask",
    "distributed",
    "torch",
    "torchvision",
    "timm",
)


def doctor() -> None:
    """Show versions, readers, devices, memory and what is missing; exit code 1 if pathopipe can't work here.

    \b
    Example:
      pathopipe doctor
    """
    import psutil

    from pathopipe.cluster import usable_cores

    missing = []
    print(f"pathopipe  {pathopipe.__version__}")
    print(f"python     {platform.python_version()} on {platform.system()} {platform.machine()} ({sys.executable})")
    memory = psutil.virtual_memory()
    print(
        f"machine    {usable_cores()} of {os.cpu_count()} cores usable, {memory.total / 2**30:.1f} GiB memory, ", end=""
    )
    print(f"{memory.available / 2**30:.1f} GiB free")
    for package in _PACKAGES:
        try:
            print(f"package    {package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(f"package {package} is not installed; pip install {package}")
    missing += _check_readers()
    missing += _check_torch()
    print("weights    none are needed for 'handcrafted'; for timm.ARCHITECTURE give --set embed.weights=FILE")
    for problem in missing:
        print(f"missing    {problem}")
    if missing:
        raise typer.Exit(1)
    print("all is well")


def _check_readers() -> list[str]:
    try:
        import openslide
    except (ImportError, OSError) as error:
        return [f"OpenSlide does not load ({error}); pip install openslide-bin"]
    print(
        f"readers    OpenSlide {openslide.__library_version__} (SVS, NDPI, MRXS, SCN, VMS, BIF, DICOM, TIFF), ", end=""
    )
    print("tifffile (OME-TIFF, tiled TIFF)")
    return []


def _check_torch() -> list[str]:
    try:
        import torch

        from pathopipe.embeddings.torchvision_import import import_torchvision

        import_torchvision()
    except (ImportError, RuntimeError, OSError) as error:
        return [f"networks can't run ({error}); pip install torch torchvision timm; 'handcrafted' works without"]
    print(f"cpu        {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads for networks")
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(number)
            print(f"gpu        {device.name}, {device.total_memory / 2**30:.0f} GiB")
    else:
        print("gpu        none that torch can use; networks run on the CPU")
    return []
