"""Slide classifiers: trained on the cohort, or applied to it. The command resumes; its figures and tables stay in its folder."""


rule mil:
    input:
        # Predictions are written into the stores, which verification reads.
        slides=receipts("verify" if VERIFY == "end" else "embed"),
        manifest=config["manifest"],
    output:
        touch(f"{DONE}/mil-{{name}}"),
    log:
        f"{LOGS}/mil-{{name}}.log",
    threads: lambda wildcards: MIL[wildcards.name]["threads"]
    resources:
        mem_mb=lambda wildcards: MIL[wildcards.name]["mem_mb"],
        runtime=lambda wildcards: MIL[wildcards.name]["minutes"],
        gpu=lambda wildcards: MIL[wildcards.name]["gpus"],
    params:
        command=lambda wildcards: MIL[wildcards.name]["command"],
        features=out_folder,
        out=f"{OUT}/mil/{{name}}",
        options=lambda wildcards: shlex.join(MIL[wildcards.name]["options"]),
        # Only training computes for long.
        threads=lambda wildcards, threads: f"--threads {threads}" if MIL[wildcards.name]["command"] == "train" else "",
    shell:
        "pathopipe mil {params.command} --manifest {input.manifest:q} --features {params.features:q}"
        " --out {params.out:q} {params.threads} {params.options} > {log:q} 2>&1"
