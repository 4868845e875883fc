"""Encryption of exported files at rest, in the format of age (age-encryption.org/v1), by `pyrage`.

The key is an age identity ("AGE-SECRET-KEY-1..."): `age-keygen` makes one, and `age --decrypt` opens the files
anywhere. It comes from a file or from the environment, and is never logged.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.errors import ConfigError, DataError, SetupError

KEY_VARIABLE = "SHARDWRIGHT_EXPORT_KEY"
SUFFIX = ".age"


def identity_from(key_file: str | None) -> Any:
    """The identity in `key_file`, or else in the environment's KEY_VARIABLE.

    Raises SetupError without pyrage, ConfigError where there is no key or it is none; the message never shows it.
    """
    try:
        import pyrage
    except ImportError as error:
        raise SetupError("Encryption needs pyrage; install shardwright[encryption].") from error
    if key_file is not None:
        try:
            text = Path(key_file).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"key_file={key_file} cannot be read: {error}.") from error
        place = f"key_file={key_file}"
    else:
        text, place = os.environ.get(KEY_VARIABLE, ""), f"The environment's {KEY_VARIABLE}"
        if not text:
            raise ConfigError(f"Encryption needs a key: name a file by key_file=..., or set {KEY_VARIABLE}.")
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    try:
        (line,) = lines
        return pyrage.x25519.Identity.from_str(line)
    except (ValueError, pyrage.IdentityError):
        raise ConfigError(
            f"{place} holds no age identity (one line AGE-SECRET-KEY-1...); make one by `age-keygen -o FILE`."
        ) from None


def seal(files: Sequence[Path], identity: Any) -> None:
    """Replace each file by its encrypted form, FILE.age."""
    import pyrage

    for path in files:
        pyrage.encrypt_file(str(path), str(path) + SUFFIX, [identity.to_public()])
        path.unlink()


def unseal(folder: Path, to: Path, identity: Any) -> None:
    """Write the files of `folder` into the new folder `to`, those that are encrypted decrypted.

    Raises DataError where the key is not the one they were encrypted with, or a file is damaged.
    """
    import shutil

    import pyrage

    for path in sorted(folder.iterdir()):
        if path.name.endswith(SUFFIX):
            try:
                pyrage.decrypt_file(str(path), str(to / path.name.removesuffix(SUFFIX)), [identity])
            except (pyrage.DecryptError, OSError) as error:
                raise DataError(f"{path} cannot be decrypted with this key, or is damaged: {error}.") from None
        else:
            shutil.copy2(path, to / path.name)
