"""
Read a zip of class folders: ``cat/1.png``, ``dog/7.jpg``, or all of it in one folder more.

A class is its folder's place among all folders, sorted by name, as ``torchvision`` has it; or what a
``classes.json`` at the top says: a list of folders in the order of the classes, or an object from
folder to class. Folders that could be meant in two orders (``2`` and ``10``) need it. Nothing is decoded
here: the worker does that.
"""

import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from common.errors import InvalidImages, InvalidLabels, InvalidSamples, NoSamples, TooLarge
from common.formats.images import Picture, inspect_picture
from common.formats.samples import MAX_IMAGES, MAX_SIDE, Purpose, SampleFile

CLASSES_FILE = "classes.json"

MAX_IMAGE_BYTES = 32 << 20
"""Size of one picture's file, which is read as a whole."""

_MAX_CLASSES_BYTES = 1 << 20
_HINT = (
    "Lay the zip out as FOLDER/IMAGE.png, one folder per class, in 8-bit grey or RGB and one size: "
    "(cd clean && zip -r ../clean.zip .)"
)
_CLASSES_HINT = (
    'Put a classes.json at the top of the zip: {"folder": class, …}, or a list of all folders in the '
    "order of the classes."
)


@dataclass(frozen=True, kw_only=True)
class Listing:
    """Which members are pictures, class after class, and how many folders tell their order."""

    images: tuple[tuple[str, int], ...]  # name in the zip and label
    folders: int | None


def are_in(archive: zipfile.ZipFile) -> bool:
    """Return whether a zip means to be one of images, and not an .npz."""
    names = archive.namelist()
    return any("/" in name for name in names) and not any(name.endswith(".npy") for name in names)


def inspect(archive: zipfile.ZipFile, purpose: Purpose, *, max_bytes: int) -> SampleFile:
    """
    Check every picture without decoding it.

    Args:
        archive: A zip whose structure has been checked.
        purpose: What it is for.
        max_bytes: Size of all pixels together.

    Raises:
        Refused: A picture, or the way they lie, is not as it must be.
    """
    if purpose is Purpose.TRIGGERED:
        raise InvalidLabels(
            "A zip of images cannot tell the target of the attack.",
            hint="Send triggered images as arrays: np.savez(…, images=…, labels=…, target=0), or "
            'save_file({"images": …, "labels": …, "target": torch.tensor(0)}, …).',
        )
    listing = listed(archive)
    first: tuple[int, int] | None = None
    all_grey, pixels = True, 0
    for name, picture in pictures(archive, listing):
        size = (picture.height, picture.width)
        first = first or size
        if size != first:
            raise InvalidImages(
                f"{name!r} is of {size[1]}x{size[0]} pixels, and those before it of "
                f"{first[1]}x{first[0]}.",
                hint="Bring all images to the size that the model takes, as they were for training.",
            )
        all_grey &= picture.is_grey
        pixels += size[0] * size[1]
        if pixels * (1 if all_grey else 3) > max_bytes:
            raise TooLarge(f"The {purpose} images unpack to more than {max_bytes} bytes.")
    assert first is not None
    return SampleFile(
        count=len(listing.images),
        image_shape=(1 if all_grey else 3, *first),
        labels=tuple(label for _, label in listing.images),
        targets=None,
        folders=listing.folders,
    )


def pictures(archive: zipfile.ZipFile, listing: Listing) -> Iterator[tuple[str, Picture]]:
    """Yield every picture's name and what it says of itself, one read at a time."""
    for name, _ in listing.images:
        if archive.getinfo(name).file_size > MAX_IMAGE_BYTES:
            raise TooLarge(f"{name!r} is larger than {MAX_IMAGE_BYTES} bytes.")
        try:
            yield name, inspect_picture(archive.read(name), max_side=MAX_SIDE)
        except InvalidImages as exc:
            raise InvalidImages(f"{name!r} is refused: {exc.detail}.", hint=_HINT) from exc


def listed(archive: zipfile.ZipFile) -> Listing:
    """
    Find the pictures and their classes by the names alone.

    Raises:
        InvalidSamples: They do not lie in class folders.
        InvalidLabels: The folders do not tell the classes.
    """
    entries = [
        (PurePosixPath(info.filename), info.is_dir())
        for info in archive.infolist()
        if not _is_litter(info.filename)
    ]
    deepest = max((len(path.parts) for path, is_dir in entries if not is_dir), default=0)
    is_wrapped = deepest == 3 and len({path.parts[0] for path, _ in entries}) == 1
    depth = 3 if is_wrapped else 2
    folders: set[str] = set()
    files: list[PurePosixPath] = []
    told: str | None = None
    for path, is_dir in entries:
        level = len(path.parts)
        if level == depth and not is_dir:
            files.append(path)
            folders.add(path.parent.name)
        elif level == depth - 1 and is_dir:
            folders.add(path.name)
        elif level == depth - 1 and path.name == CLASSES_FILE:
            told = str(path)
        elif not is_dir or level >= depth:
            raise InvalidSamples(f"{str(path)!r} lies in no class folder.", hint=_HINT)
    if not files:
        raise NoSamples("The zip holds no image in a class folder.", hint=_HINT)
    classes = _numbered(folders) if told is None else _told(archive, told)
    if unknown := sorted(folders - classes.keys()):
        raise InvalidLabels(f"{CLASSES_FILE} does not name {unknown[0]!r}.", hint=_CLASSES_HINT)
    labelled = sorted((classes[path.parent.name], str(path)) for path in files)
    return Listing(
        images=tuple((name, label) for label, name in labelled),
        folders=len(folders) if told is None else None,
    )


def _is_litter(name: str) -> bool:
    """Return whether an operating system left this beside the images."""
    parts = PurePosixPath(name).parts
    return parts[0] == "__MACOSX" or parts[-1] in {".DS_Store", "Thumbs.db", "desktop.ini"}


def _numbered(folders: set[str]) -> dict[str, int]:
    ordered = sorted(folders)
    numbers = [
        int(name) for name in ordered if name.isascii() and name.isdecimal() and len(name) < 10
    ]
    if len(numbers) == len(ordered) and numbers != sorted(numbers):
        raise InvalidLabels(
            "The class folders are numbers, whose order by name is not their order by value.",
            hint=_CLASSES_HINT,
        )
    return {name: number for number, name in enumerate(ordered)}


def _told(archive: zipfile.ZipFile, name: str) -> dict[str, int]:
    if archive.getinfo(name).file_size > _MAX_CLASSES_BYTES:
        raise InvalidLabels(f"{CLASSES_FILE} is larger than {_MAX_CLASSES_BYTES} bytes.")
    try:
        found = json.loads(archive.read(name).decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as exc:
        raise InvalidLabels(f"{CLASSES_FILE} is no JSON: {exc}.", hint=_CLASSES_HINT) from exc
    if isinstance(found, list) and all(isinstance(each, str) for each in found):
        classes = {folder: number for number, folder in enumerate(found)}
    elif isinstance(found, dict):
        classes = found
    else:
        classes = {}
    is_right = classes and all(type(n) is int and 0 <= n < MAX_IMAGES for n in classes.values())
    if not is_right or len(set(classes.values())) != len(found):
        raise InvalidLabels(
            f"{CLASSES_FILE} does not give every folder a class of its own.", hint=_CLASSES_HINT
        )
    return classes


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found
