"""The BOINC project's side: app versions, signatures, templates, plan classes, a server for trials.

    version = package(Path("apps"), app="worker", number="1.00", job=Path("vbox_job.xml"), ...)
    with DevServer(root) as server, DevClient(folder) as client: ...

What a real project needs is files (`vmjob.project.package`, `signing`, `templates`, `planclass`);
the server (`vmjob.project.devserver`) is for development, on this computer only.
"""
