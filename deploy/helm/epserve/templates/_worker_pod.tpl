{{/* The workers' pod, the same below a StatefulSet and a LeaderWorkerSet. */}}
{{- define "epserve.workerPod" -}}
{{- $w := .Values.workers -}}
{{- $gpus := ne .Values.backend "host" -}}
metadata:
  labels:
    {{- include "epserve.labels" . | nindent 4 }}
    app.kubernetes.io/component: worker
    {{- with $w.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- with $w.podAnnotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  {{- include "epserve.podCommon" . | nindent 2 }}
  {{- with include "epserve.placement" $w }}
  {{- . | nindent 2 }}
  {{- end }}
  {{- if and $gpus (eq .Values.gpu.allocation "devicePlugin") }}
  runtimeClassName: {{ .Values.gpu.runtimeClassName }}
  {{- end }}
  affinity:
    podAntiAffinity:
      requiredDuringSchedulingIgnoredDuringExecution:
        - topologyKey: kubernetes.io/hostname
          labelSelector:
            matchLabels:
              {{- include "epserve.selectorLabels" . | nindent 14 }}
              app.kubernetes.io/component: worker
  {{- with $w.topologySpreadConstraints }}
  topologySpreadConstraints:
    {{- range . }}
    - {{- toYaml . | nindent 6 }}
      labelSelector:
        matchLabels:
          {{- include "epserve.selectorLabels" $ | nindent 10 }}
          app.kubernetes.io/component: worker
    {{- end }}
  {{- end }}
  # A worker that is told to leave lets its batches finish, 15 s for them and 15 s for the farewell.
  terminationGracePeriodSeconds: 40
  {{- if and $gpus (eq .Values.gpu.allocation "dra") }}
  resourceClaims:
    - name: gpus
      resourceClaimTemplateName: {{ include "epserve.fullname" . }}-gpus
  {{- end }}
  containers:
    {{- range $index := until (int $w.perPod) }}
    {{- include "epserve.workerContainer" (list $ $index) | nindent 4 }}
    {{- end }}
  volumes:
    {{- include "epserve.volumes" (list . .Values.tls.workerSecretName) | nindent 4 }}
    # Heaps of host workers, and NCCL's way within a node: one /dev/shm for all containers.
    - name: shm
      emptyDir: {medium: Memory, sizeLimit: {{ $w.sharedMemory }}}
{{- end }}

{{/* Takes (list . INDEX). */}}
{{- define "epserve.workerContainer" -}}
{{- $ := index . 0 -}}
{{- $index := index . 1 -}}
{{- $w := $.Values.workers -}}
{{- $gpus := ne $.Values.backend "host" -}}
- name: worker-{{ $index }}
  {{- include "epserve.containerCommon" $ | nindent 2 }}
  command: [epserve-worker]
  args:
    - --coordinator={{ include "epserve.controlAddress" $ }}
    - --checkpoint=/checkpoint
    - --cluster-id={{ include "epserve.fullname" $ }}
    - --backend={{ $.Values.backend }}
    {{- if $gpus }}
    - --device={{ $index }}
    {{- else }}
    - --compute-threads={{ $w.computeThreads }}
    {{- end }}
    - --max-batch-tokens={{ int64 $.Values.maxBatchTokens }}
    - --slots={{ $.Values.slots }}
    - --peer-timeout-ms={{ int64 $w.peerTimeoutMs }}
    - --log-format={{ $.Values.log.format }}
    - --log-level={{ $.Values.log.level }}
    {{- with include "epserve.tlsArgs" $ }}
    {{- . | nindent 4 }}
    {{- end }}
    {{- with $w.extraArgs }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  env:
    - name: POD_NAME
      valueFrom: {fieldRef: {fieldPath: metadata.name}}
    # Host name and process id, the default, are alike in the pod's containers. In the environment,
    # because the kubelet does not put POD_NAME into a probe's arguments.
    - {name: EPSERVE_WORKER_ID, value: $(POD_NAME)-w{{ $index }}}
    {{- if $gpus }}
    # The same number means the same GPU in every container.
    - {name: CUDA_DEVICE_ORDER, value: PCI_BUS_ID}
    {{- if and (eq $.Values.gpu.allocation "devicePlugin") (gt $index 0) }}
    # The first container has asked for all GPUs of the node.
    - {name: NVIDIA_VISIBLE_DEVICES, value: all}
    {{- end }}
    {{- end }}
    {{- with $w.env }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  # A worker serves nothing and dials the coordinator, so it is asked about there. Ready: it has joined
  # with its weights. No liveness probe: a worker that hangs is fenced by its lease, one that fails
  # exits, and a probe by way of the coordinator would restart all workers, weights and all, whenever
  # the coordinator is away.
  readinessProbe:
    exec:
      command:
        - epserve
        - status
        - --server={{ include "epserve.controlAddress" $ }}
        - --timeout=4
        {{- with include "epserve.tlsArgs" $ }}
        {{- . | nindent 8 }}
        {{- end }}
    periodSeconds: 5
    timeoutSeconds: 5
    failureThreshold: 2
  resources:
    {{- if and $gpus (eq $.Values.gpu.allocation "dra") }}
    {{- toYaml (merge (dict "claims" (list (dict "name" "gpus"))) $w.resources) | nindent 4 }}
    {{- else if and $gpus (eq $index 0) }}
    {{- $all := dict $.Values.gpu.resourceName (int $w.perPod) }}
    {{- toYaml (mergeOverwrite (deepCopy $w.resources) (dict "limits" $all)) | nindent 4 }}
    {{- else }}
    {{- toYaml $w.resources | nindent 4 }}
    {{- end }}
  volumeMounts:
    {{- include "epserve.volumeMounts" $ | nindent 4 }}
    - {name: shm, mountPath: /dev/shm}
{{- end }}
