"""What an import says when a package of an extra is missing. Standard library only."""


def missing_extra(who: str, extra: str, error: ImportError) -> ImportError:
    """The error to raise instead, with the command that installs the extra.

    Args:
        who: needs it, in words. `error`: what Python said.
    """
    return ImportError(
        f"{who} needs {error.name or 'a package'}, which is not installed: pip install 'prescope[{extra}]'",
        name=error.name,
        path=error.path,
    )
