"""The sequence networks that HierTCN is compared with, trained by the same loop."""
