"""The elements of ``vbox_job.xml``: those of vboxwrapper 26212, of its ancestors, and those that
need nothing here. One table, which the reader, its messages and its tests go by."""

from __future__ import annotations

__all__ = ["CONTROLLER_MODELS", "CONTROLLER_TYPES", "FLAGS", "FORWARD", "KNOWN", "LISTS", "NAMES",
           "NOT_NEEDED", "NUMBERS", "OUTDATED", "PORTS", "TEXTS", "outdated"]

FLAGS = frozenset({
    "enable_network", "network_bridged_mode", "enable_nat_dns_host_resolver",
    "enable_shared_directory", "share_slot_dir", "enable_scratch_directory", "share_project_dir",
    "copy_cmdline_to_shared", "enable_floppyio", "enable_cern_dataformat",
    "enable_isocontextualization", "enable_cache_disk", "boot_iso", "enable_remotedesktop",
    "enable_graphics_support", "enable_screenshots_on_error", "enable_vm_savestate_usage",
    "disable_automatic_checkpoints"})
#: Numbers that may have a fraction -> what they are where the file says nothing.
NUMBERS = {"memory_size_mb": 512.0, "vram_size_mb": 16.0, "minimum_checkpoint_interval": 600.0,
           "job_duration": 0.0, "minimum_heartbeat_interval": 600.0}
PORTS = frozenset({"pf_guest_port", "pf_host_port"})
TEXTS = frozenset({"os_name", "vm_disk_controller_type", "vm_disk_controller_model",
                   "vm_network_driver"})
#: Names of files: below the shared folder, but for the disk's.
NAMES = frozenset({"multiattach_vdi_file", "fraction_done_filename", "heartbeat_filename",
                   "completion_trigger_file", "temporary_exit_trigger_file"})
#: The same, any number of them.
LISTS = frozenset({"copy_to_shared", "trickle_trigger_file", "intermediate_upload_file"})
KNOWN = FLAGS | NUMBERS.keys() | PORTS | TEXTS | NAMES | LISTS | {"port_forward"}

#: Inside <port_forward>.
FORWARD = frozenset({"host_port", "guest_port", "is_remote", "nports"})

#: What VirtualBox wants to know and QEMU's devices make needless -> why.
NOT_NEEDED = {
    "vram_size_mb": "the machine has no screen of its own, or one that needs no setting",
    "vm_disk_controller_type": "disks are virtio disks, or SATA ones where the job boots its own",
    "vm_disk_controller_model": "disks are virtio disks, or SATA ones where the job boots its own",
    "vm_network_driver": "the network card is virtio, or e1000 where the job boots its own disk",
    "enable_nat_dns_host_resolver": "names are always resolved as on this computer",
    "enable_vm_savestate_usage": "with --slot, a stop always makes a last checkpoint",
}

# What `VBoxManage storagectl` knows.
CONTROLLER_TYPES = ("ide", "sata", "scsi", "floppy", "sas", "usb", "pcie", "virtio")
CONTROLLER_MODELS = ("LSILogic", "LSILogicSAS", "BusLogic", "IntelAHCI", "PIIX3", "PIIX4", "ICH6",
                     "I82078", "USB", "NVMe", "VirtIO")

#: Elements that older releases of vboxwrapper knew -> what to write; a ``*`` stands for the rest.
OUTDATED = {
    "enable_gbac": "",
    "vm_disk_image_name": "nothing: the disk is called vm_image.vdi",
    "vm_disk_image_type": "nothing: the disk is called vm_image.vdi",
    "floppy_image_name": "enable_floppyio",
    "image_filename": "nothing: the disk is called vm_image.vdi",
    "max_elapsed_time": "job_duration",
    "bridged_mode": "network_bridged_mode",
    "enable_network_bridged_mode": "network_bridged_mode",
    "pf_desired_guest_port": "pf_guest_port",
    "pf_desired_host_port": "pf_host_port",
    "web_application": "pf_guest_port",
    "vm_shared_folder_*": "enable_shared_directory",
    "vm_task_execution_*": "a script shared/boinc_app",
}


def outdated(name: str) -> str | None:
    """What to write instead of an element of older releases ('': nothing); None: it is not one."""
    if name in OUTDATED:
        return OUTDATED[name]
    for pattern, instead in OUTDATED.items():
        if pattern.endswith("*") and name.startswith(pattern[:-1]):
            return instead
    return None
