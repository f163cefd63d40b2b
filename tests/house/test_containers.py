"""The container files: the documented services, each a program that is installed."""

import tomllib

import yaml

from paths import ROOT

SERVICES = {
    "positronic-to-lerobot": "positronic",
    "openpi-stats": "openpi",
    "openpi-train": "openpi",
    "openpi-server": "openpi",
    "openpi-server-8001": "openpi",
    "positronic-inference": "positronic",
}


def test_services_run_installed_programs_in_images_that_are_built_here():
    compose = yaml.safe_load((ROOT / "docker" / "docker-compose.yml").read_text())
    programs = tomllib.loads((ROOT / "packages" / "openpi-positronic" / "pyproject.toml").read_text())["project"]
    dockerfile = (ROOT / "docker" / "Dockerfile").read_text()
    assert compose["services"].keys() == SERVICES.keys()
    for name, service in compose["services"].items():
        assert service["entrypoint"] == [name.removesuffix("-8001")]
        assert service["entrypoint"][0] in programs["scripts"]
        assert service["image"] == f"positro/{SERVICES[name]}:${{IMAGE_TAG:-latest}}"
        assert f"FROM base AS {service['build']['target']}\n" in dockerfile
        assert (ROOT / "docker" / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
        assert service["working_dir"] == "/positronic"
    assert compose["services"]["openpi-server"]["ports"] == ["8000:8000"]
    assert compose["services"]["openpi-server-8001"]["ports"] == ["8001:8000"]
