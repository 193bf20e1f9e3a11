"""The services that a run can be tracked with, one module each; a module is imported when its service is asked for."""
