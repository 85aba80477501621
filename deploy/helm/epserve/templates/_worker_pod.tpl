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
  runtimeClassName: {{ .Values.gpu.runtimeClassName | quote }}
  {{- end }}
  {{- if .Values.cudaSharedMemory.enabled }}
  # For handles of callers' CUDA memory. Forbidden by the baseline and restricted Pod Security Standards.
  hostIPC: true
  hostPID: true
  {{- end }}
  affinity:
    {{- include "epserve.workerAffinity" . | nindent 4 }}
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
  terminationGracePeriodSeconds: {{ include "epserve.workerGraceSeconds" . }}
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
    {{- include "epserve.volumes" (list . "worker") | nindent 4 }}
    # Heaps of host workers, and NCCL's way within a node: one /dev/shm for all containers.
    - name: shm
      emptyDir: {medium: Memory, sizeLimit: {{ $w.sharedMemory | quote }}}
{{- end }}

{{/* workers.affinity, and that pods of one release never share a node. */}}
{{- define "epserve.workerAffinity" -}}
{{- $labels := include "epserve.selectorLabels" . | fromYaml -}}
{{- $_ := set $labels "app.kubernetes.io/component" "worker" -}}
{{- $selector := dict "matchLabels" $labels -}}
{{- $apart := dict "topologyKey" "kubernetes.io/hostname" "labelSelector" $selector -}}
{{- $affinity := deepCopy (.Values.workers.affinity | default dict) -}}
{{- $anti := get $affinity "podAntiAffinity" | default dict -}}
{{- $rule := "requiredDuringSchedulingIgnoredDuringExecution" -}}
{{- $_ := set $anti $rule (append (get $anti $rule | default list) $apart) -}}
{{- set $affinity "podAntiAffinity" $anti | toYaml -}}
{{- end }}

{{/* Takes (list . INDEX). */}}
{{- define "epserve.workerContainer" -}}
{{- $ := index . 0 -}}
{{- $index := index . 1 -}}
{{- $w := $.Values.workers -}}
{{- $gpus := ne $.Values.backend "host" -}}
{{- $health := add (int $w.healthPort) $index -}}
- name: worker-{{ $index }}
  {{- include "epserve.containerCommon" $ | nindent 2 }}
  command: [epserve-worker]
  args:
    {{- $args := include "epserve.workerArgs" . }}
    {{- $args | nindent 4 }}
    {{- with include "epserve.extraArgs" (list "workers" $args $w.extraArgs) | trim }}
    {{- . | nindent 4 }}
    {{- end }}
  env:
    - name: POD_NAME
      valueFrom: {fieldRef: {fieldPath: metadata.name}}
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
  ports:
    - {name: health-{{ $index }}, containerPort: {{ $health }}}
  # Nothing asks about the coordinator: while that is away, a worker keeps its weights and waits.
  startupProbe:
    grpc: {port: {{ $health }}, service: liveness}
    periodSeconds: 2
    timeoutSeconds: 2
    failureThreshold: 150
  # Joined, with its weights read, or standing by.
  readinessProbe:
    grpc: {port: {{ $health }}, service: readiness}
    periodSeconds: 2
    timeoutSeconds: 2
    failureThreshold: 1
  livenessProbe:
    grpc: {port: {{ $health }}, service: liveness}
    periodSeconds: 10
    timeoutSeconds: 5
    failureThreshold: 3
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
