"""Writing an artifact folder: all of it or nothing.

Everything goes into a temporary folder beside the target, which is renamed into place as the last step. A lock beside it
keeps two compiles from writing the same artifact. An interrupted or failed compile leaves no trace.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from llmc import manifest
from llmc.errors import OutputError
from llmc.manifest import FileInfo, Manifest, TokenizerFiles
from llmc.units import format_bytes

if TYPE_CHECKING:
    from llmc.importer.source import ModelSource, TokenizerInfo

_CHUNK = 1 << 20


def hash_file(path: Path) -> FileInfo:
    """Size and sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    size = 0
    with path.open("rb") as stream:
        while piece := stream.read(_CHUNK):
            digest.update(piece)
            size += len(piece)
    return FileInfo(size, digest.hexdigest())


@contextlib.contextmanager
def explained(out: Path) -> Iterator[None]:
    """Turn what the file system refuses into one sentence about ``out``."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            free = ""
            with contextlib.suppress(OSError):
                free = f" ({format_bytes(shutil.disk_usage(out.parent).free)} free)"
            raise OutputError(
                f"no room to write the artifact {out}: {error.strerror}{free}: free some space or choose another -o"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise OutputError(
                f"the artifact cannot be written to {out}: {error.strerror}: choose a writable folder with -o"
            ) from error
        if error.errno in (errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG):
            raise OutputError(f"the artifact cannot be written to {out}: {error.strerror}: choose another -o") from error
        raise


def write_manifest(contents: Manifest, folder: Path) -> None:
    """Hash the files of ``folder`` that are not in ``contents.files`` yet, and write the manifest."""
    for path in files_below(folder):
        relative = path.relative_to(folder).as_posix()
        if relative not in contents.files:
            contents.files[relative] = hash_file(path)
    contents.files = dict(sorted(contents.files.items()))
    (folder / manifest.FILE_NAME).write_text(contents.to_json(), encoding="utf-8")


def files_below(folder: Path) -> list[Path]:
    """The files in ``folder`` and the folders below it, in order."""
    return sorted(p for p in folder.rglob("*") if p.is_file())


def link_files(source: Path, root: Path, names: Iterable[str]) -> None:
    """The files ``names`` of ``source`` under ``root`` too: as hard links, or copies where the file system has none."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source / name, root / name)
        except OSError:
            shutil.copy2(source / name, root / name)


class ArtifactWriter:
    """A context manager: write below ``root``, then :meth:`commit`. Leaving without a commit removes everything.

    Raises OutputError if ``out`` is taken (by something that is not an artifact, or by one without ``force``), cannot be
    written, or is being written by another process.
    """

    def __init__(self, out: Path, *, force: bool = False, marker: str = manifest.FILE_NAME) -> None:
        """``marker``: the file by which a folder is known as one that ``force`` may replace."""
        self.out = Path(out).absolute()
        self.force = force
        self.marker = marker
        self.root = Path()

    def __enter__(self) -> ArtifactWriter:
        from filelock import FileLock, Timeout

        self._refuse_taken()
        with explained(self.out):
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self.out.parent / f".{self.out.name}.lock")
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                raise OutputError(f"another llmc is writing {self.out} right now: wait for it, or choose another -o") from None
            try:
                self.root = Path(tempfile.mkdtemp(prefix=f".{self.out.name}.", suffix=".tmp", dir=self.out.parent))
            except BaseException:
                self._unlock()
                raise
        return self

    def _refuse_taken(self) -> None:
        if not self.out.exists():
            return
        if not self.out.is_dir():
            raise OutputError(f"{self.out} is a file, and an artifact is a folder: choose another -o")
        if not any(self.out.iterdir()):
            return
        if not (self.out / self.marker).is_file():
            raise OutputError(f"{self.out} is a folder with other things in it, which llmc will not touch: choose another -o")
        if not self.force:
            raise OutputError(f"{self.out} already holds an artifact: add --force to replace it, or choose another -o")

    def check_room(self, nbytes: int) -> None:
        """Raise OutputError now rather than minutes later if the disk has less than ``nbytes`` free."""
        free = shutil.disk_usage(self.out.parent).free
        if free < nbytes:
            raise OutputError(
                f"no room to write the artifact {self.out}: it takes {format_bytes(nbytes)} and {format_bytes(free)} are free: "
                "free some space or choose another -o"
            )

    def commit(self, contents: Manifest) -> None:
        """Write the manifest, and rename the folder into place."""
        write_manifest(contents, self.root)
        self.rename()

    def rename(self) -> None:
        """The last step, where the folder is no artifact itself."""
        umask = os.umask(0)
        os.umask(umask)
        self.root.chmod(0o777 & ~umask)  # mkdtemp made it private
        old = None
        if self.out.exists():
            old = self.root.with_suffix(".old")
            self.out.rename(old)
        self.root.rename(self.out)
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)

    def __exit__(self, *_: object) -> None:
        if self.root != Path() and self.root.exists():
            shutil.rmtree(self.root, ignore_errors=True)
        self._unlock()

    def _unlock(self) -> None:
        path = Path(self._lock.lock_file)
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        self._lock.release()


def write_tokenizer(source: ModelSource, root: Path) -> TokenizerFiles | None:
    """Write the model's tokenizer into ``root/tokenizer``; None if it has none. Raises ModelError if its file is damaged."""
    folder = root / "tokenizer"
    folder.mkdir()
    info: TokenizerInfo | None = source.write_tokenizer(folder)
    if info is None:
        folder.rmdir()
        return None
    template = "tokenizer/chat_template.jinja" if info.chat_template is not None else None
    return TokenizerFiles(
        file="tokenizer/tokenizer.json",
        chat_template=template,
        bos_token_id=info.bos_token_id,
        eos_token_ids=info.eos_token_ids,
        pad_token_id=info.pad_token_id,
        bos_token=info.bos_token,
        eos_token=info.eos_token,
    )
