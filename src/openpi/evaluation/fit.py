"""Whether a policy and a world speak of the same robot, before anything is played."""

from __future__ import annotations

from collections.abc import Mapping

from openpi_client.base_policy import Metadata


def check(
    contract: Mapping[str, object], recipe: Mapping[str, object], *, rate_hz: float, any_rate: bool = False
) -> None:
    """
    Args:
        contract: of the policy, as servers tell it (`Contract.as_metadata`); what it does not tell is not compared.
        recipe: that of the world's recipe, which it speaks.
        rate_hz: of the world.
        any_rate: do not compare rates: each row is played for one tick of the world.
    Raises:
        ValueError: they do not fit; all differences are named.
    """
    try:
        problems = [*_camera_problems(contract, recipe), *_state_problems(contract, recipe)]
        problems += _action_problems(contract, recipe, rate_hz, any_rate=any_rate)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"the contract that the server tells is none of openpi's ({error!r})") from error
    if problems:
        raise ValueError(f"the policy (robot '{contract.get('robot')}') does not fit this world: {'; '.join(problems)}")


def completed(metadata: Metadata, recipe: Metadata, *, rate_hz: float) -> dict[str, object]:
    """What a server says, with what it does not tell taken from the world's recipe; rates are the world's."""
    contract = dict(metadata.get("contract") or {})
    actions = {**recipe.get("actions", {}), "horizon": None, **contract.get("actions", {})}
    return {**metadata, "contract": {**recipe, **contract, "actions": actions, "control_hz": rate_hz}}


def _action_problems(contract: Metadata, recipe: Metadata, rate_hz: float, *, any_rate: bool) -> list[str]:
    problems = []
    width, expected = (side.get("actions", {}).get("width") for side in (contract, recipe))
    if None not in (width, expected) and width != expected:
        problems.append(f"its actions have {width} dimensions, the world takes {expected}")
    trained_hz = contract.get("control_hz")
    if trained_hz is not None and trained_hz != rate_hz and not any_rate:
        problems.append(
            f"it was trained at {trained_hz:g} Hz, the world runs at {rate_hz:g} Hz (--any-rate plays a row a tick)"
        )
    return problems


def _camera_problems(contract: Metadata, recipe: Metadata) -> list[str]:
    if "cameras" not in contract or "cameras" not in recipe:
        return []
    taken, sent = ({c["key"]: c["required"] for c in side["cameras"]} for side in (contract, recipe))
    missing = [key for key, required in taken.items() if required and key not in sent]
    foreign = [key for key, required in sent.items() if required and key not in taken]
    return [f"it needs the camera '{key}', which the world does not have" for key in missing] + [
        f"the world's camera '{key}' is none that it takes ({', '.join(taken) or 'none'})" for key in foreign
    ]


def _state_problems(contract: Metadata, recipe: Metadata) -> list[str]:
    if "state" not in contract or "state" not in recipe:
        return []
    sent = {vector["key"]: vector["width"] for vector in recipe["state"]}
    return [
        f"it needs '{vector['key']}' of {vector['width']} values; the world sends "
        f"{', '.join(f'{key} of {width}' for key, width in sent.items())}"
        for vector in contract["state"]
        if sent.get(vector["key"]) != vector["width"]
    ]
