"""Build hook: a wheel carries configs/ as trainer/configs; an editable install reads the clone's own configs/."""

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class WheelConfigs(BuildHookInterface):  # type: ignore[type-arg]
    """Hatchling calls `initialize` before it collects files; `version` is "standard" or "editable"."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version != "editable":
            build_data["force_include"]["configs"] = "trainer/configs"
