import told


def is_master_online() -> bool:
    return not told.fault("no master")
