"""Where the tissue of a slide is."""


rule tissue:
    input:
        plan=ancient(PLAN),
    output:
        f"{DONE}/tissue/{{slide_id}}.json",
    log:
        f"{LOGS}/tissue/{{slide_id}}.log",
    retries: config["retries"]
    group:
        "slide"
    threads: config["threads"]
    resources:
        mem_mb=needs("tissue", "mem_mb"),
        runtime=needs("tissue", "minutes"),
    params:
        slide=slide_path,
        out=out_folder,
        options=slide_options(),
    shell:
        "pathopipe tissue --out {params.out:q} --slide-id={wildcards.slide_id:q} {params.options}"
        " --threads {threads} --receipt {output:q} -- {params.slide:q} > {log:q} 2>&1"
