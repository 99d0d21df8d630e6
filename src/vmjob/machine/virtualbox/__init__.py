"""The VirtualBox driver: machines as processes of VBoxHeadless, managed by VBoxManage."""
