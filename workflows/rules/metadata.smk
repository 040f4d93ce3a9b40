"""Fields of the catalogue: learnt from the cohort, or predicted for it. The command resumes; its figures and tables stay in its folder."""


rule metadata:
    input:
        slides=receipts("embed"),
        manifest=config["manifest"],
    output:
        touch(f"{DONE}/metadata-{{name}}"),
    log:
        f"{LOGS}/metadata-{{name}}.log",
    threads: lambda wildcards: METADATA[wildcards.name]["threads"]
    resources:
        mem_mb=lambda wildcards: METADATA[wildcards.name]["mem_mb"],
        runtime=lambda wildcards: METADATA[wildcards.name]["minutes"],
        gpu=lambda wildcards: METADATA[wildcards.name]["gpus"],
    params:
        command=lambda wildcards: METADATA[wildcards.name]["command"],
        features=out_folder,
        out=f"{OUT}/metadata/{{name}}",
        options=lambda wildcards: shlex.join(METADATA[wildcards.name]["options"]),
    shell:
        "pathopipe metadata {params.command} --manifest {input.manifest:q} --features {params.features:q}"
        " --out {params.out:q} {params.options} > {log:q} 2>&1"
