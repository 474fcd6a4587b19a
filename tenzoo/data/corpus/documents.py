"""The documents of a file or a folder."""

from pathlib import Path

from tenzoo.data.checks import MISSING_EXTRA


def read_documents(source: str, *, arg: str, keep_empty: bool = False) -> list[str]:
    """The texts of a source, in order.

    Args:
        source: A ``.parquet`` file with a column ``text``, of which each row is a document; a folder, of which each
            file ``*.txt`` is one, in the order of the names; or any other file, one document in UTF-8.
        arg: The argument that the source came from, for errors.
        keep_empty: Whether documents without a character are there, too.

    Raises:
        FileNotFoundError: If there is no such file or folder.
        ImportError: If the source needs a package that is not installed.
        ValueError: If it is not readable, or there is no text in it.
    """
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"expected a file or a folder of text in `{arg}`, got {source!r}, which does not exist")
    if path.is_dir():
        files = sorted(file for file in path.rglob("*.txt") if file.is_file())
        if not files:
            raise ValueError(f"expected files *.txt in the folder in `{arg}`, got none in {source!r}")
        documents = [_read_text(file, arg) for file in files]
    elif path.suffix.lower() == ".parquet":
        documents = _read_parquet(path, arg)
    else:
        documents = [_read_text(path, arg)]
    if not any(documents):
        raise ValueError(f"expected text in `{arg}`, got none in {source!r}")
    return documents if keep_empty else [document for document in documents if document]


def read_prompts(source: str) -> list[str]:
    """The prompts of a source, in order: the lines of a text file, or the documents of any other source.

    Args:
        source: As in :func:`read_documents`.

    Raises:
        FileNotFoundError: If there is no such file or folder.
        ImportError: If the source needs a package that is not installed.
        ValueError: If it is not readable, or a prompt is empty.
    """
    documents = read_documents(source, arg="predict", keep_empty=True)
    if Path(source).is_dir() or Path(source).suffix.lower() == ".parquet":
        if "" in documents:
            raise ValueError(
                f"expected prompts in `predict`, got an empty one, number {documents.index('') + 1}, in {source!r}"
            )
        return documents
    lines = documents[0].removesuffix("\n").split("\n")
    for number, line in enumerate(lines, 1):
        if not line:
            raise ValueError(f"expected a prompt in each line in `predict`, got an empty line {number} in {source!r}")
    return lines


def _read_text(path: Path, arg: str) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"expected text in UTF-8 in `{arg}`, got {str(path)!r}, which is not at byte {error.start}"
        ) from error


def _read_parquet(path: Path, arg: str) -> list[str]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(
            f"expected pyarrow to read {str(path)!r} in `{arg}`, got no such package; {MISSING_EXTRA}"
        ) from error
    try:
        table = parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        said = " ".join(str(error).split())[:200]
        raise ValueError(f"expected a Parquet file in `{arg}`, got {str(path)!r}: {said}") from error
    if "text" not in table.column_names:
        raise ValueError(f"expected a column 'text' in `{arg}`, got {table.column_names} in {str(path)!r}")
    cells: list[str] = table.column("text").to_pylist()
    for number, cell in enumerate(cells, 1):
        if not isinstance(cell, str):
            raise ValueError(f"expected text in row {number} of {str(path)!r} in `{arg}`, got {cell!r}")
    return cells
