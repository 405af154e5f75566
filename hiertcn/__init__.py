"""hiertcn: from an event log to live, session-aware recommendations."""

__version__ = "0.1.0"
