"""The model card of a suite, and its way to the hub."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, StrictUndefined

TEMPLATE = Path(__file__).with_name("card.md.jinja")
LEFT_HERE = ["data/*", "checkpoint-*/*", ".*", "*/.*", "study/journal.jsonl"]
"""What is not pushed: the documents (other people's texts, under their own licences), checkpoints and journals."""


def plain(text: Any) -> str:
    """A text as one line without what Markdown would read as more than text (the template escapes HTML)."""
    line = " ".join(str(text).split())
    return "".join(f"\\{letter}" if letter in "\\`*_[]|#" else letter for letter in line)


def model_card(plan: Mapping[str, Any], data: Mapping[str, Any], evaluation: pd.DataFrame, study: Mapping[str, Any]) -> str:
    """README.md of a suite: what it is, on which data, how well it reconstructs, what steering with it did, how to load it."""
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page.filters["plain"] = plain
    rows = evaluation[evaluation["category"] == "all"]
    return page.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        plan=plan, data=data, rows=rows.to_dict("records"), study=study, variant=rows["variant"].iloc[0]
    )


def push(out: Path, repository: str, private: bool = True) -> str:
    """Uploads a finished suite to the hub, without `LEFT_HERE`; an upload that was cut off goes on. Returns the address.

    Raises ValueError with what to do where the folder is not whole, or the hub cannot be reached or says no.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    if not (out / "README.md").is_file():
        raise ValueError(f"{str(out)!r} holds no finished suite (there is no README.md); let qsae suite come to its end first.")
    api = HfApi()
    again = "what is uploaded already is not sent again: run the same command"
    try:
        address = str(api.create_repo(repository, private=private, exist_ok=True))
        # Up to huggingface_hub 1 the upload that can be cut off has a name of its own; later it is the usual one.
        upload: Any = getattr(api, "upload_large_folder", None)
        if upload is not None:
            upload(repo_id=repository, folder_path=out, repo_type="model", ignore_patterns=LEFT_HERE)
        else:
            api.upload_folder(repo_id=repository, folder_path=out, ignore_patterns=LEFT_HERE, commit_message="A suite of SAEs")
    except HfHubHTTPError as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise ValueError(
            f"The hub refused {repository!r} ({reason}); log in with a token that may write (hf auth login); {again}."
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ValueError(
            f"The suite could not be pushed to {repository!r} ({reason}); check network, disk and name; {again}."
        ) from error
    return address
