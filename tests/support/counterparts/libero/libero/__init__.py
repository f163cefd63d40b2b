def get_libero_path(name: str) -> str:
    assert name == "bddl_files"
    return "/bddl"
